"""Nothing that is opened is executed, and the explorer answers nobody but the page it serves."""
import http.client, json, os, pickle

import numpy as np
import pytest
import torch
from commands import call, refused
from safetensors.torch import save_file

from subspace_circuits import explorer
from subspace_circuits.activations import capture
from subspace_circuits.decompositions.feature_clusters import read_dictionary
from subspace_circuits.exchange import read_held
from subspace_circuits.models import open_model
from subspace_circuits.partition import Partition, read_published
from subspace_circuits.toy_models import load_model

torch.set_num_threads(1)


class Trap:
    "What a pickle may hold: it makes a folder when it is executed."
    def __init__(self, folder): self.folder = folder

    def __reduce__(self): return os.mkdir, (str(self.folder),)


def test_pickles(tmp_path):
    "Every suffix that a model, a matrix, a graph or a dictionary may have; that the trap works is shown at the end."
    sprung = tmp_path/"sprung"
    raw, zipped = pickle.dumps(Trap(sprung)), tmp_path/"zipped"
    torch.save({"R.parametrizations.weight.0.base": Trap(sprung), "cfg": Trap(sprung)}, zipped)
    for name in ("model.pt", "model.pth", "model.bin", "model.safetensors", "model.gguf", "R-toy-x0.mid.pt", "graph.pt",
                 "rows.npy", "rows.pkl"):
        for data in (raw, zipped.read_bytes()):
            (tmp_path/name).write_bytes(data)
            for read in (open_model, read_published, read_held):
                with pytest.raises(ValueError): read(tmp_path/name)
    (tmp_path/"sae").mkdir()
    (tmp_path/"sae"/"cfg.json").write_text('{"architecture": "standard", "hook_name": "blocks.0.hook_resid_mid"}')
    (tmp_path/"sae"/"sae_weights.safetensors").write_bytes(raw)
    with pytest.raises(ValueError, match="pickles are not opened"): read_dictionary(tmp_path/"sae")
    np.save(tmp_path/"rows.npy", np.array([Trap(sprung)], dtype=object), allow_pickle=True)
    with pytest.raises(ValueError): read_held(tmp_path/"rows.npy")
    assert not sprung.exists()
    pickle.loads(raw)
    assert sprung.exists()


def test_settings_name_no_object(tmp_path):
    sprung = tmp_path/"sprung"
    for name, said in (("apd", "is no YAML"), ("multidim", "is no YAML")):
        (tmp_path/"s.yaml").write_text(f"method: !!python/object/apply:os.mkdir ['{sprung}']\n")
        assert said in refused("decompose", name, tmp_path/"s.yaml", "--out", tmp_path/"out")
    assert not sprung.exists() and not (tmp_path/"out").exists()


def test_code_in_a_folder_of_hugging_face(tmp_path):
    "Code beside a model, a tokenizer of a class of its own and a chat template are left alone."
    import tokenizers
    from transformers import GPT2Config, GPT2LMHeadModel, PreTrainedTokenizerFast
    sprung, folder = tmp_path/"sprung", tmp_path/"model"
    evil = f"import os\nos.mkdir({str(sprung)!r})\nclass Evil: pass\n"
    words = tokenizers.Tokenizer(tokenizers.models.WordLevel({"a": 0, "b": 1, "c": 2, "<s>": 3}, "a"))
    PreTrainedTokenizerFast(tokenizer_object=words, bos_token="<s>").save_pretrained(folder)
    GPT2LMHeadModel(GPT2Config(vocab_size=4, n_positions=16, n_embd=4, n_layer=1, n_head=1, bos_token_id=3,
                               eos_token_id=3)).save_pretrained(folder)
    for name in ("modeling_evil.py", "tokenization_evil.py", "configuration_evil.py"): (folder/name).write_text(evil)
    template = "{{ ''.__class__.__mro__[1].__subclasses__() }}{% for o in range(10**12) %}x{% endfor %}"
    for name, more in (("config.json", {"auto_map": {"AutoModelForCausalLM": "modeling_evil.Evil",
                                                     "AutoConfig": "configuration_evil.Evil"}}),
                       ("tokenizer_config.json", {"auto_map": {"AutoTokenizer": ["tokenization_evil.Evil", None]},
                                                  "chat_template": template})):
        held = json.loads((folder/name).read_text()) if (folder/name).exists() else {}
        (folder/name).write_text(json.dumps(held | more))
    (folder/"chat_template.jinja").write_text(template)
    try: model, _ = open_model(folder)
    except ValueError: pass # as well: what matters is that it was not run
    else: assert model(torch.tensor([[3, 0, 1]])).shape == (1, 3, 4)
    assert not sprung.exists()


def test_names_that_lead_out_of_a_run(tmp_path):
    "A run whose partitions, store or index are links to elsewhere is not served."
    for name in ("store", "partitions"): (tmp_path/"elsewhere"/name).mkdir(parents=True)
    (tmp_path/"elsewhere"/"store"/"store.json").write_text("{}")
    (tmp_path/"elsewhere"/"partitions"/"x").mkdir()
    (tmp_path/"elsewhere"/"partitions"/"x"/"partition.json").write_text("{}")
    (tmp_path/"run").mkdir()
    for name in ("store", "partitions"): (tmp_path/"run"/name).symlink_to(tmp_path/"elsewhere"/name)
    assert "leads out of" in refused("explore", tmp_path/"run")


@pytest.fixture(scope="module")
def served(tmp_path_factory):
    folder, (model, task, _), eye = tmp_path_factory.mktemp("served"), load_model("induction"), torch.eye(64)
    site = "blocks.0.hook_resid_mid"
    capture(model, task, [site], folder/"store", shards=1, sequences=8)
    Partition({"a": eye[:, :4], "<img src=x>": eye[:, 4:]}, site).save_pretrained(folder/"partitions"/"x")
    server = explorer.start_server(explorer.open_run(folder, "induction"))
    yield server.server_address
    server.stop()


def ask(served, path="/", **headers):
    connection = http.client.HTTPConnection(*served)
    connection.request("GET", path, headers=headers)
    answer = connection.getresponse()
    return answer.status, answer.read().decode()


def test_who_is_answered(served):
    "This machine alone, by its own names, and no page from elsewhere, whatever name it borrows."
    host, port = served
    assert host == "127.0.0.1"
    assert ask(served)[0] == ask(served, "/random", Origin=f"http://localhost:{port}")[0] == 200
    for headers in (dict(Host="evil.example"), dict(Host=f"evil.example:{port}"), dict(Host="127.0.0.1"),
                    dict(Origin="http://evil.example"), dict(Origin="null"), dict(Origin=f"https://127.0.0.1:{port}"),
                    dict(Origin=f"http://127.0.0.1:{port}.evil.example")):
        status, said = ask(served, "/random", **headers)
        assert (status, said) == (403, "ask for 127.0.0.1"), headers


def test_what_is_answered(served):
    "Nothing of the disk, and no text of a name or a query as markup."
    for path in ("/../store/store.json", "/store/store.json", "/%2e%2e/store.json", "//etc/passwd", "/view?site=../x",
                 "/view?row=1e9", "/view?row=%3Cscript%3E", "/attribution?rows=1,x", "/find?after=nan"):
        status, said = ask(served, path)
        assert status == 400 and "error" in json.loads(said), (path, said)
    page = ask(served)[1]
    assert "<img src=x>" not in page and "Content-Security-Policy" in page


def test_a_safetensors_file_says_no_more_than_tensors(tmp_path):
    "Words in its metadata are words, also where they are as ours."
    save_file({"a": torch.zeros(2)}, tmp_path/"model.safetensors",
              metadata=dict(written="subspace_circuits: patches, sha256 00, {\"step\": [[[[1]]]]}"))
    with pytest.raises(ValueError, match="damaged"): read_held(tmp_path/"model.safetensors")
    assert call("capture", tmp_path/"model.safetensors", "--out", tmp_path/"store")[0] == 2
