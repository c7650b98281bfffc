"""Set-up shared by all tests. Run pytest from the repository root; pyproject.toml puts it on the import path."""

import pytest
import torch


@pytest.fixture(scope="session", autouse=True)
def settled_environment(tmp_path_factory):
    """Caches and downloads go to a throw-away folder, results do not depend on the number of cores or on luck."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("NANOCHAT_BASE_DIR", str(tmp_path_factory.mktemp("nanochat_base")))
        for variable in ("RANK", "WORLD_SIZE", "LOCAL_RANK"):  # set by torchrun, they mean other processes to wait for
            patch.delenv(variable, raising=False)
        torch.set_num_threads(1)
        torch.use_deterministic_algorithms(True)
        yield
