"""A role's layers on several ranks one behind the other, and the orders in which they train and score."""
