"""What is where: parallel ranks, parameters and buffers. Pure: no torch, no file."""
