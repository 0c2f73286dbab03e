BEGIN TRANSACTION;
CREATE TABLE bounds (part TEXT NOT NULL, history TEXT NOT NULL, delta REAL NOT NULL,
    epsilon REAL NOT NULL, accountant TEXT NOT NULL, PRIMARY KEY (part, history, delta));
INSERT INTO "bounds" VALUES('train','[{"noise_multiplier":1.1,"sample_rate":0.25,"steps":5}]',1.0e-05,3.89084067918145759534e+00,'prv');
INSERT INTO "bounds" VALUES('train','[{"noise_multiplier":1.1,"sample_rate":0.25,"steps":10}]',1.0e-05,5.10662971383971697747e+00,'prv');
INSERT INTO "bounds" VALUES('train','[{"noise_multiplier":1.1,"sample_rate":0.25,"steps":15}]',1.0e-05,6.07404990431856539601e+00,'prv');
INSERT INTO "bounds" VALUES('validation','[{"noise_multiplier":4.5,"sample_rate":1.0,"steps":1}]',1.0e-05,8.14172269288014227583e-01,'gaussian');
INSERT INTO "bounds" VALUES('train','[{"noise_multiplier":1.1,"sample_rate":0.25,"steps":15},{"noise_multiplier":2.0,"sample_rate":0.5,"steps":4}]',1.0e-05,6.56434568462663392551e+00,'prv');
INSERT INTO "bounds" VALUES('test','[{"noise_multiplier":6.25,"sample_rate":1.0,"steps":1}]',1.0e-05,0.568594466541189,'gaussian');
CREATE TABLE charges (
    number INTEGER PRIMARY KEY, task TEXT NOT NULL UNIQUE, run TEXT NOT NULL, plan_hash TEXT NOT NULL,
    study TEXT NOT NULL, server_round INTEGER NOT NULL, purpose TEXT NOT NULL, part TEXT NOT NULL,
    mechanism TEXT NOT NULL, noise_multiplier REAL NOT NULL, sample_rate REAL NOT NULL,
    steps INTEGER NOT NULL, nominal_patients INTEGER NOT NULL, time TEXT NOT NULL,
    previous_hash TEXT NOT NULL, hash TEXT NOT NULL);
INSERT INTO "charges" VALUES(1,'0000000000000000000000000000000000000000000000000000000000000001','20261122-100000-ab12','abababababababababababababababababababababababababababababababab','chest',1,'train','train','subsampled_gaussian',1.1,0.25,5,100,'2026-11-22T10:01:00+00:00','0000000000000000000000000000000000000000000000000000000000000000','48c60439be1470e42bf79282ed1fc838814cd6a646a8f4eb67ff9898153de917');
INSERT INTO "charges" VALUES(2,'0000000000000000000000000000000000000000000000000000000000000002','20261122-100000-ab12','abababababababababababababababababababababababababababababababab','chest',2,'train','train','subsampled_gaussian',1.1,0.25,5,100,'2026-11-22T10:02:00+00:00','48c60439be1470e42bf79282ed1fc838814cd6a646a8f4eb67ff9898153de917','0c21b6bb97b778a8c7e20fef75772d2f49ad922211e426698bad5326a4aa4f88');
INSERT INTO "charges" VALUES(3,'0000000000000000000000000000000000000000000000000000000000000003','20261122-100000-ab12','abababababababababababababababababababababababababababababababab','chest',3,'train','train','subsampled_gaussian',1.1,0.25,5,100,'2026-11-22T10:03:00+00:00','0c21b6bb97b778a8c7e20fef75772d2f49ad922211e426698bad5326a4aa4f88','b117dcbe646e6442db4a7ae51d6731f4622cef0732faa1fc0165c9870def325c');
INSERT INTO "charges" VALUES(4,'0000000000000000000000000000000000000000000000000000000000000004','20261122-100000-ab12','abababababababababababababababababababababababababababababababab','chest',3,'evaluate','validation','subsampled_gaussian',4.5,1.0,1,100,'2026-11-22T10:04:00+00:00','b117dcbe646e6442db4a7ae51d6731f4622cef0732faa1fc0165c9870def325c','3de4494727caed960f7cbaffb40789cc38fb7a18d05b6c5ca2d9205b1a365183');
INSERT INTO "charges" VALUES(5,'0000000000000000000000000000000000000000000000000000000000000005','20261122-110000-cd34','cdcdcdcdcdcdcdcdcdcdcdcdcdcdcdcdcdcdcdcdcdcdcdcdcdcdcdcdcdcdcdcd','hip',1,'train','train','subsampled_gaussian',2.0,0.5,4,100,'2026-11-22T10:05:00+00:00','3de4494727caed960f7cbaffb40789cc38fb7a18d05b6c5ca2d9205b1a365183','ae5f54bbc945dafec66e819c49eda02387a6b11f860131d276833dc97498400b');
INSERT INTO "charges" VALUES(6,'0000000000000000000000000000000000000000000000000000000000000006','20261122-110000-cd34','cdcdcdcdcdcdcdcdcdcdcdcdcdcdcdcdcdcdcdcdcdcdcdcdcdcdcdcdcdcdcdcd','hip',1,'evaluate','test','subsampled_gaussian',6.25,1.0,1,100,'2026-11-22T10:06:00+00:00','ae5f54bbc945dafec66e819c49eda02387a6b11f860131d276833dc97498400b','82c2e7b530a6f20fe5e84915ccadcfe8ff42540e2e33a8f6c6777027650e997b');
CREATE TABLE outcomes (
    task TEXT PRIMARY KEY, kind TEXT NOT NULL, code TEXT NOT NULL, time TEXT NOT NULL);
INSERT INTO "outcomes" VALUES('0000000000000000000000000000000000000000000000000000000000000001','stored','','2026-11-24T20:28:59+00:00');
INSERT INTO "outcomes" VALUES('0000000000000000000000000000000000000000000000000000000000000002','stored','','2026-11-24T20:28:59+00:00');
INSERT INTO "outcomes" VALUES('0000000000000000000000000000000000000000000000000000000000000003','stored','','2026-11-24T20:28:59+00:00');
INSERT INTO "outcomes" VALUES('0000000000000000000000000000000000000000000000000000000000000004','stored','','2026-11-24T20:28:59+00:00');
INSERT INTO "outcomes" VALUES('0000000000000000000000000000000000000000000000000000000000000005','failed','site_error','2026-11-24T20:29:00+00:00');
COMMIT;
