"""Does the edit do what is claimed? A toy VLM and real text weights, with every control that a sceptic would ask for.

edits → experiments on the toy and on SmolLM2 → statistics → report
"""
