"""What lies in a run directory besides logs: attempts, lock, status, and which saves are whole."""
