"""Loss terms: named tensors -> (N,T), minimised, unreduced, 0 outside the mask."""
