$ create -q -f qcow2 base 4M
$ create -q -f qcow2 -b base -F qcow2 middle
$ create -q -f qcow2 -b middle -F qcow2 disk 5M
@ -f qcow2 disk
write -P 3 1M 1M
read -P 3 1M 1M
read -P 0 0 1M
read -P 0 4M 1M
close
open -o driver=qcow2 base
write -P 7 0 64k
close
open -o driver=qcow2 disk
read -P 7 0 64k
read -P 0 64k 64k
