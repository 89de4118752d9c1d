"""What a run costs: parameters, FLOPs, memory and time, before it and after."""
