"""What an adapter does to a module, as bits of a byte; DROP goes beyond that, in the plans of calls that train."""

LORA, GAIN, INPUT, SHIFT, HEAD = 1, 2, 4, 8, 16  # INPUT: a gain or a turn of what the base reads
BOTH = 32  # in a plan: some row changes what the base reads, and has a gain or a turn of what it gives
TAIL = 64  # on a row's last tokens only, from its invocation on (aLoRA); in a plan, of which tokens the call tells
TURN = 128  # of the output
DROP = 256  # in a plan: some row's adapter has dropout, if the module is in training mode
