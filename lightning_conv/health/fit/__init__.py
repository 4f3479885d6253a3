"""How small the loss of given samples can become, whatever the weights are."""
