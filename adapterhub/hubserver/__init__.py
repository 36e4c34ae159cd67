"""A server compatible with the Hugging Face Hub, for teams without access to the public Hub and for tests."""
