"""Grid: signals, distances, powers, moments of settling, base, division, scores, slots of fewer bits (see grid.py)."""
from grid import *

SETS={"16k":(16384,12,10),"32k":(32768,6,6)}
b=1024
once=lambda D,p,**k:O(D,p,settle="once",**k)
V=dict(window=.8,protect=.2,coreset=False)
RUNS=[("16k","1024: "+nm,f) for nm,f in [
 ("exact",lambda *a:P(*a)),("D1 p2",X(b,**O(p=2.))),("D1 p3",X(b,**O())),("win D1 p2",Wd(b,**O(p=2.))),("D1 p2 V",X(b,**O(p=2.),**V)),("win D1 p3",Wd(b,**O())),("D1 p3 V",X(b,**O(),**V)),("sink p2 V",X(b,**O(p=2.,sink_far="only"),**V)),
 ("win sink p2",Wd(b,**O(p=2.,sink_far="only"))),("once D.31 p2 V",X(b,**once(5/16,2.),**V)),("once D.31 p3 V",X(b,**once(5/16,3.),**V)),("once D.31 p3 ns V",X(b,**once(5/16,3.),**V,**N)),("win once D.31 p3",Wd(b,**once(5/16,3.))),
 ("once D.5 p3 V",X(b,**once(.5,3.),**V)),("once D.5 p4 V",X(b,**once(.5,4.),**V)),("once D.5 p3 ns V",X(b,**once(.5,3.),**V,**N)),("once D.5 p3 max V",X(b,**once(.5,3.,heads="max"),**V)),("once D.5 p3 rms V",X(b,**once(.5,3.,signal="rms"),**V)),
 ("rel.5 p2 V",X(b,**O(-.5,2.),**V)),("rel.5 p3 V",X(b,**O(-.5,3.),**V)),("rel.5 p3 ns V",X(b,**O(-.5,3.),**V,**N)),("rel.25 p3 V",X(b,**O(-.25,3.),**V)),("win rel.5 p3",Wd(b,**O(-.5,3.))),
 ("D1 p2 max V",X(b,**O(p=2.,heads="max"),**V)),("D1 p4 V",X(b,**O(p=4.),**V)),("D1 p2 ns V",X(b,**O(p=2.),**V,**N)),("D.5 p3 V",X(b,**O(.5),**V)),("D.5 p4 V",X(b,**O(.5,4.),**V)),
 ("edge 1 V",X(b,**O(p=1.,signal="edge"),**V)),("win edge 1",Wd(b,**O(p=1.,signal="edge"))),
 ("D1 p2 cap2 V",X(b,**O(p=2.,cap=2.),**V)),("D1 p2 once 2B V",X(b,**O(p=2.,settle="once",first=2.),**V)),("D1 p2 every B V",X(b,**O(p=2.,settle=b),**V)),("D1 p2 every16q V",X(b,**O(p=2.,every=16),**V)),
 ("D1 p2 base.125 V",X(b,**O(p=2.,base=.125),**V)),("D1 p2 base.2 V",X(b,**O(p=2.,base=.2),**V)),("D1 p2 base.45 V",X(b,**O(p=2.,base=.45),**V)),
 ("D1 p2 w.8 p.14",X(b,**O(p=2.,window=.8,protect=.14))),("D1 p2 w.9 nc",X(b,**O(p=2.,window=.9,protect=.1,coreset=False))),("D1 p2 w.7 nc",X(b,**O(p=2.,window=.7,protect=.3,coreset=False))),("D1 p2 w.6 nc",X(b,**O(p=2.,window=.6,protect=.4,coreset=False))),
 ("D1 p2 w.7 nc mass.5",X(b,**O(p=2.,window=.7,protect=.3,coreset=False,mass_share=.5,mass_decay=.9))),("D1 p2 w.6 nc mass.5 .98",X(b,**O(p=2.,window=.6,protect=.4,coreset=False,mass_share=.5,mass_decay=.98))),
 ("D1 p2 a0 w.6",X(b,**O(p=2.,alpha=0.))),("D1 p2 free V",X(b,**O(p=2.,score="free"),**V)),("D1 p2 value V",X(b,**O(p=2.,score="value"),**V)),
 ("D1 p2 int8 V",X(b,**O(p=2.,bits=8),**V)),("int8 1984 D1 p2 V",X(1984,**O(p=2.,bits=8),**V)),("D1 p2 4b V",X(b,**O(p=2.,bits=4,group=32,turn=True),**V)),("4b 3276 D1 p2 V",X(3276,**O(p=2.,bits=4,group=32,turn=True),**V)),
]]
for b in (256,4096,512,2048,8192):
    RUNS+=[("16k","%d: "%b+nm,f) for nm,f in [("window equal",Wd(b)),("win D1 p2",Wd(b,**O(p=2.))),("win once D.31 p3",Wd(b,**once(5/16,3.))),("D1 p2",X(b,**O(p=2.))),("D1 p2 V",X(b,**O(p=2.),**V)),("D1 p3 V",X(b,**O(),**V)),("once D.31 p3 V",X(b,**once(5/16,3.),**V)),
      ("rel.5 p2 V",X(b,**O(-.5,2.),**V)),("snapkv",Sc(b,"snapkv")),("keydiff",Sc(b,"keydiff"))]]
for b in (1024,2048): RUNS+=[("32k","%d: "%b+nm,f) for nm,f in [("D1 p2 V",X(b,**O(p=2.),**V)),("once D.31 p3 V",X(b,**once(5/16,3.),**V))]]
