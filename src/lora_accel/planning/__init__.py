"""What a run needs, before it starts: parameters, memory, time, and advice."""
