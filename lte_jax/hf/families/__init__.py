"""The checkpoint layout of each family, a file for each."""
