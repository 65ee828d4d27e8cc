"""Models of any supported family as the three things training needs: a policy, a scorer, adapters."""
