"""What a study is, how it runs, and how it is compared."""
