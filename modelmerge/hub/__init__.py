"""The Hugging Face Hub: repositories, ranges of files, sparse copies, uploads."""
