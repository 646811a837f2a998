"""What layers read in a forward: the plan, what else is known of the call, and the state that they share."""
