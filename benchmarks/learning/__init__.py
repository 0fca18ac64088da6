"""What `quality.py` is made of: facts with cached lower layers, methods, trials, and what is drawn from them."""
