"""What a distillation step takes on a cluster that is not at hand: memory, FLOPs, collectives, time at the roofline."""
