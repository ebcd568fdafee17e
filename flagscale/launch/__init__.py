"""From a recipe and a machine to exact commands, and running them here. Never imports torch."""
