"""What attention and whole training steps take, measured on this device or compiled for another."""
