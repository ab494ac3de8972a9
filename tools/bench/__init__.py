"""The figures of speed and memory, measured on the machine at hand: one question to a script."""
