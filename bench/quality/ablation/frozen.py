"""Grid: one observation at n = B, frozen, budgets capped at twice the tokens so far and divided anew at doublings; all budgets, 32K texts."""
from grid import *

SETS={"16k":(16384,12,10),"32k":(32768,5,6)}
def U(D=.5,p=3.,**k): return dict(budgets="online",distance=D,power=p,**k)
once=lambda D=.5,p=3.,**k:U(D,p,settle="once",**k)
fro=lambda D=.5,p=3.,**k:U(D,p,update="frozen",cap=2.,**k)
mx=dict(heads="max"); oa=dict(signal="outabs")
V=dict(window=.8,protect=.2,coreset=False); V9=dict(window=.9,protect=.1,coreset=False); V2=dict(window=.7,protect=.3,coreset=False,mass_share=.5,mass_decay=.9)
V3=dict(window=.8,protect=.2,coreset=False,mass_share=.5,mass_decay=.9); T=dict(protect_top=True,**V); C=dict(window=.8,protect=.14)
RUNS=[]
def add(st,b,*cs):
    for nm,f in cs: RUNS.append((st,"%d: %s"%(b,nm),f))
b=1024
add("16k",b,("D1 p2 V",X(b,**U(1.,2.),**V)),("once V",X(b,**once(),**V)),("fro V",X(b,**fro(),**V)),("fro max V",X(b,**fro(**mx),**V)),("win fro max",Wd(b,**fro(**mx))),("once max C",X(b,**once(**mx),**C)),("once max 60/28/12",X(b,**once(**mx))),
 ("keep max V",X(b,**U(update="keep",cap=2.,**mx),**V)),("mean max V",X(b,**U(update="mean",cap=2.,**mx),**V)),("cumul max V",X(b,**U(update="cumulative",cap=2.,**mx),**V)),("fresh D.5 p3 max V",X(b,**U(cap=2.,**mx),**V)),
 ("fro outabs V",X(b,**fro(**oa),**V)),("win fro outabs",Wd(b,**fro(**oa))),("fro outabs every16q V",X(b,**fro(every=16,**oa),**V)),("outabs once p2 ns V",X(b,**once(.5,2.,signal="outabs",sink_far=False),**V)),("outabs once p3 V",X(b,**once(.5,3.,signal="outabs"),**V)),
 ("fro max V2",X(b,**fro(**mx),**V2)),("fro max V3",X(b,**fro(**mx),**V3)),("fro max T",X(b,**fro(**mx),**T)),("fro max V9",X(b,**fro(**mx),**V9)),("fro p2.5 max V",X(b,**fro(p=2.5,**mx),**V)),("fro max base.45 V",X(b,**fro(base=.45,**mx),**V)),("fro max every16q V",X(b,**fro(every=16,**mx),**V)))
for b in (256,512,4096,2048):
    add("16k",b,("win fro max",Wd(b,**fro(**mx))),("fro max V",X(b,**fro(**mx),**V)),("fro outabs V",X(b,**fro(**oa),**V)),("win fro outabs",Wd(b,**fro(**oa))))
    if b<=512: add("16k",b,("fro max V9",X(b,**fro(**mx),**V9)),("fro max T",X(b,**fro(**mx),**T)),("fro max V2",X(b,**fro(**mx),**V2)),("fro max V3",X(b,**fro(**mx),**V3)),("once max V",X(b,**once(**mx),**V)),
       ("fro max base.45 V",X(b,**fro(base=.45,**mx),**V)),("fro max C",X(b,**fro(**mx),**C)))
b=8192; add("16k",b,("window equal",Wd(b)),("win fro max",Wd(b,**fro(**mx))),("fro max V",X(b,**fro(**mx),**V)),("snapkv",Sc(b,"snapkv")))
for b in (1024,2048): add("32k",b,("fro max V",X(b,**fro(**mx),**V)),("fro outabs V",X(b,**fro(**oa),**V)))
b=1024; add("32k",b,("exact",lambda *a:P(*a)),("win fro max",Wd(b,**fro(**mx))))
b=1024
add("16k",b,("fro max free V",X(b,**fro(**mx),**V,score="free")),("fro max value V",X(b,**fro(**mx),**V,score="value")),("fro max int8 V",X(b,**fro(bits=8,**mx),**V)),("int8 1984 fro max V",X(1984,**fro(bits=8,**mx),**V)),("win int8 1984",Wd(1984,**fro(bits=8,**mx))),("4b 3276 fro max V",X(3276,**fro(bits=4,group=32,turn=True,**mx),**V)))
