"""Second-order compression: changing a weight so that the squared error of its products is least on calibration data.

For a matrix `W` and inputs `x`, the error of `W'` is `E |(W' - W) x|² = tr((W' - W) G (W' - W)ᵀ)`, where `G = E x xᵀ`
is the Gram matrix of the inputs. `gram` finds it for a site, `factor` prepares it, `sweep` goes over the columns once,
and `descended` over rounded ones again and again.
"""

from sparc.passes.second_order.descend import descended
from sparc.passes.second_order.factor import Factor, factor
from sparc.passes.second_order.gram import gram_watches, reconstruction_error, site_gram
from sparc.passes.second_order.sweep import sweep

__all__ = ["Factor", "descended", "factor", "gram_watches", "reconstruction_error", "site_gram", "sweep"]
