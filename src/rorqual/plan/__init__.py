"""The cost of a run: parameters, FLOPs, memory and time, predicted and measured."""
