"""The maths on tensors: products, spectra, edits, rounding. No paths, no JSON, no logging.

One convention holds everywhere. ``nn.Linear`` stores ``(out, in)``, so the rows of one head are

    W_Q : (d_head, d_model)        W_K : (d_head, d_model)
    logit(x_q, x_k) = x_qᵀ M x_k / sqrt(d_head),      M = W_Qᵀ W_K      (d_model, d_model)

``M`` has rank at most ``d_head`` and is never formed. The spectrum is the one at RoPE offset zero,
the object of the QK Product Steering paper (arXiv 2606.20419).

This package imports no torch by itself, so that ``rule`` stays cheap for the command line.
"""
