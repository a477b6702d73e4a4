"""Parts that commands share. The commands themselves are the modules of the folder above."""
