"""Phase 2: the trunk held fixed, the head trained, and the loss measured."""
