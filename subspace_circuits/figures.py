"The two functions that every page draws with."
from jaxtyping import Float
from torch import Tensor


def show(
    fig, # A plotly figure
    name:str, # Its identity on the page
    alt:str, # What it shows, in words: for those who cannot see it, and where it cannot be drawn
):
    "Display a figure in notebooks; the site draws it from the same data, in the reader's colours and width."
    from IPython.display import display
    fig.layout.template.data = None # how other kinds of traces would look
    fig.layout.meta = dict(fig.layout.meta or {}, name=name, alt=alt)
    display({"application/vnd.plotly.v1+json": fig.to_plotly_json(), "text/plain": alt}, raw=True)


def heatmaps(
    panels:dict[str, Float[Tensor, "row col"]], # Title to matrix
    rows:list[str], # Names of the rows
    cols:list[str]|None=None, # Names of the columns; the rows' if not given
    digits:int|None=None, # Print values with this many digits
    size:int=330, # Pixels of a panel
): # A plotly figure
    "Draw matrices between 0 and their largest value, side by side."
    from plotly.subplots import make_subplots
    fig = make_subplots(1, len(panels), subplot_titles=list(panels), horizontal_spacing=.12)
    for i, m in enumerate(panels.values(), 1):
        text = None if digits is None else [[f"{o:.{digits}f}" for o in r] for r in m.tolist()]
        fig.add_heatmap(z=[[round(o, 3) for o in r] for r in m.tolist()], x=cols or rows, y=rows, text=text,
                        texttemplate=text and "%{text}",
                        colorscale="Blues", zmin=0, zmax=max(1, m.max().item()), showscale=False, row=1, col=i)
    fig.update_yaxes(autorange="reversed", type="category").update_xaxes(type="category")
    return fig.update_layout(width=60 + size*len(panels), height=size + 70, margin=dict(l=70, r=10, t=40, b=50),
                             template="plotly_white")
