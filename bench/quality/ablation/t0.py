import sys, os, json, time, torch
torch.set_num_threads(2)
import texts, policies
from model import Model, score
from compare import Bench
M=Model("/work/shared/lm"); D="/work/shared/lm/dev.txt"
n=int(sys.argv[1]); 
T=texts.Set(texts.plain(D,n,2), texts.facts(D,n,2,8,"/work/shared/lm/make_recall.py"), n)
B=Bench(M,T,open("/tmp/t0.jsonl","a"),"cpu")
B.run("exact", lambda *a: policies.Policy(*a))
b=n//16 if n>=4096 else 256
far=json.load(open("/work/main/examples/byte_lm/model/profile.json"))["far_mass"]
B.run("window", lambda *a: policies.Window(*a,b))
B.run("equal", lambda *a: policies.Express(*a,b))
B.run("profile", lambda *a: policies.Express(*a,b,budgets="profile",far=far))
p,_=B.run("online", lambda *a: policies.Express(*a,b,budgets="online"))
print(p.history[-1][1].int().tolist())
for k in ("snapkv","keydiff","h2o"): B.run(k, lambda *a: policies.Scored(*a,b,k))
