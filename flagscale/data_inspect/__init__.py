"""From a training step to the documents it read, and back: on files alone, without torch.

arguments.py    the arguments that decide which sample is read when
"""
