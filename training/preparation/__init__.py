"""Before the steps: models and data are fetched, and what can be refused is refused."""
