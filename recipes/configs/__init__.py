"""Complete run configurations; `lightning-conv fit --config NAME` takes NAME.yaml from here."""
