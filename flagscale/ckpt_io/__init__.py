"""The only code that opens checkpoint files: readers and writers, one module a format."""
