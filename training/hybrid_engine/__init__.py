"""One role's weights, two ways to use them: training under ZeRO and generating."""
