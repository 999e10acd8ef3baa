"""How the built-in demonstration model is made: pictures, questions, training, evaluation, export."""
