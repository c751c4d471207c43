"""What train.py is made of: configuration, corpus, step, loop, checkpoints, reports and plots."""
