"""The rooms of ``ExpressivityGuard``: when it switches, what it certifies, and how phase 2 trains the head on the frozen trunk."""
