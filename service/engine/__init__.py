"""The code that owns the device. Everything above passes images and widths."""
