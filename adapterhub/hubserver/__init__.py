"""Our own Hub-compatible server, for air-gapped teams and for every test."""
