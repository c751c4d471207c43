"""What an attention call is: its arguments, static facts, masks, and the device it is for."""
