"""The mathematics, in NumPy: each forward pass directly above its hand-derived backward pass.

These functions define what every backend computes, up to rounding: a fast one may add up in another
order, flush subnormal moments of Adam to zero, and on a GPU divide and take roots to 2 ulp. They
write into arrays that the caller owns, accept float32 and float64, and favour the equation over
speed. Images have the shape (n, h, w, c) (batch, height, width, channels), or (n, m) if flattened;
every array is C-contiguous.

L is the loss. A name prefixed with d is the gradient of L with respect to the array it names, and
has its shape: dz[r, o] = ∂L/∂z[r, o]. Between arrays x w is the matrix product and * the
elementwise one; between single numbers x w is x times w.

Read dense, activations, elbo, latent, adam and conv; then importance, calibration, capacity and
labels; state, batch and philox say where a step's numbers come from. Letters are local to a module:
z is a pre-activation, but the latent in elbo, latent, importance and labels; w is a layer's weight,
but the width in a shape, a loss's weight in elbo.E3 and a draw's in importance.
"""
