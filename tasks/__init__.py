"""What models are evaluated on. Imports only nanochat.common."""
