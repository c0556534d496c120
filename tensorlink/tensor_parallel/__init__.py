"""One stage over the devices of a rig: its matrix products split among them, whole tensors to everybody outside."""
