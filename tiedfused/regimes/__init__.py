"""The regimes: ways to run the layer, each best for some sizes. One module each, all with the same two functions.

    forward(request, keep)  -> Part, or why the regime does not apply
    backward(request, keep) -> Part, or why the regime does not apply

`keep` asks for the latent to be kept from forward to backward, where any regime that reads one reads any other's.
A new regime is a module here, an entry of `REGIMES`, and its kernels in `tiedfused._backends`.
"""

from tiedfused.regimes import bottleneck, chunked, few_rows, native, stream, tiled

REGIMES = {
    "stream": stream,
    "few_rows": few_rows,
    "bottleneck": bottleneck,
    "chunked": chunked,
    "native": native,
    "tiled": tiled,
}
