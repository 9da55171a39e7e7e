"""The weight-chain library: one refined teacher in, a ReID network of any width out. No web, no database, no cloud."""
