"""The rooms of ``ExpressivityGuard``: when it switches, what it certifies, how it holds the trunk still, and how the head moves."""
