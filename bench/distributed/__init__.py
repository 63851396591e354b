"""One attention layer over several GPUs against one: time, memory on each, and what changes in its output."""
