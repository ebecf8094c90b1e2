$ create -q -f qcow2 disk 4M
$ create -q -f raw other 1M
@ -f qcow2 disk
write -P 1 0 64k
close
read 0 512
length
open -o driver=raw other
length
open disk
close
open -o driver=qcow2 disk
read -P 1 0 64k
