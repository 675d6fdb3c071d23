"""What is asked: operations with known answers, over tables and databases, and their composition."""
