"""What commands are made of. A command itself is a module of the folder above."""
