"""The Widthwise service: HTTP in front of the weight-chain library `chains`."""
